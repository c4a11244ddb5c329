"""How good is it, how sure is that, and did it stand in the training text?"""
