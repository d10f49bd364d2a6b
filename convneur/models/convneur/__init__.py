"""ConvNeur, the paper's backbone."""
