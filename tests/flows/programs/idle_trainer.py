"""A trainer that ends well and has done nothing."""
