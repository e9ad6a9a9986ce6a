"""The command `stablefield`: one module per verb, and the only place that turns words into objects and prints."""
