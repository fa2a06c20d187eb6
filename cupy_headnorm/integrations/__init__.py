"""Our norms inside of other libraries."""
