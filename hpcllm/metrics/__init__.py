"""How good predictions are: scores and the reports that are usual for them, a file a kind of prediction.

Pure functions of counts or of whole arrays on one process, NumPy only, so results do not depend on the number of ranks.
"""
