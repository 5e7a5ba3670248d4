"""The control plane's messages, generated from proto/ by `make proto`. Nothing here is written by hand."""
