"""One call from array to array: remembered, or step by step; on a GPU or in NumPy."""
