"""The neural memory's recurrence: its equations, and one file for each way to compute them."""
