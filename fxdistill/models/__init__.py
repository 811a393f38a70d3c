"""What a user's model is made of, and what it says about itself."""
