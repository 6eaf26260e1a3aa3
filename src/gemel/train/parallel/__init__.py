"""One model on many processes: the mesh, what is cut along each of its axes, and what keeps the numbers those of one process."""
