"""Generation with live scores on a terminal: `printer.TokenPrinter` and its parts."""
