"""The ways step 1 can choose heads, each in a file, and the table of them that `fit` reads."""
