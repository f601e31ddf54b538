"""The command line, the recipe, and the functions behind them."""
