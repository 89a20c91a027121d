"""Is this machine fit for a dump, and is this config?"""
