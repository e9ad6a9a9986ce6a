"""The command `stablefield`: one module per verb; only this package parses words and prints."""
