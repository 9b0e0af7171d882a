"""Speed: the ceiling of memory, our kernel by the GPU's clock, its rivals, and pages that say so."""
