"""Quality: what compression costs, and the search for the recipe that costs least."""
