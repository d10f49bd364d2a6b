"""Looking at a dataset: is it intact, and what is in it?"""
