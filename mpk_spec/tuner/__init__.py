"""Finds a schedule on the GPU itself: candidates, their measurement, the search, and rules of what was found."""
