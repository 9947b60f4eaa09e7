"""`fleet top`: the fleet, live, on a whole terminal. The only package that knows Textual."""
