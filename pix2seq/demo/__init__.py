"""Web page that shows the token sequence of an image while it is generated."""
