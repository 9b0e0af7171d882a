"""Speed on a GPU: the ceiling of memory, our kernel by the GPU's clock, its rivals, and the page that says so."""
