"""Every rule on what a call may be, with its error. Layouts in, named tuples out."""
