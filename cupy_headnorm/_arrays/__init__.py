"""Arrays of any library: their dtypes, layouts and addresses, and results made by that library."""
