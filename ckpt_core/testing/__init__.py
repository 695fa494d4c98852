"""Local doubles of remote services, shipped so that users can test against them."""
