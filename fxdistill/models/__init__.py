"""Read the structure of a user's model, and what the model says about itself."""
