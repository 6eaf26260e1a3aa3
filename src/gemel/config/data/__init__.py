"""What a data recipe says: inputs, steps, output. One variant per kind of thing, told apart by `kind`."""
