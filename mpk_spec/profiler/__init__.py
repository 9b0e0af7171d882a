"""Where the time of a token goes on a real GPU, in the plan's names, beside what the simulation said."""
