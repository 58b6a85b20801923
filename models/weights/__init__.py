"""Everything between a weights file and a state dict."""
