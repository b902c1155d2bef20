"""Grade-school word problems, and how to judge the answers to them."""
