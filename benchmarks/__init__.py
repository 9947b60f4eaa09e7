"""What is fast and what is not, measured beside the peers: `make bench`. Not tests: nothing here can fail."""
