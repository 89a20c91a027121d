"""Is this machine fit to train a student, and is this config?"""
