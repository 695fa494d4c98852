"""Shipped so that users can test against them: a local Hub server, and the contract that every store keeps."""
