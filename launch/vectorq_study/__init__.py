"""The study of VectorQ and vCache: streams replayed through the policies of the semantic cache (`replay.py`), what is
run (`tasks.py`), and what is printed and drawn.
"""
