"""What scores of some items say of all of them: statistics, races, predictions, preferences. Numpy alone."""
