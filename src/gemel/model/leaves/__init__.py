"""Matrix products, each in its own file. Techniques are swapped in here by name pattern; the model above never knows."""
