"""Where in the depth of a model its neurons are needed."""
