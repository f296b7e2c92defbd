"""Pretraining of Llama-2 and Llama-3 class models on any accelerator that JAX can see.

Nothing is imported here: `import llamajax` costs nothing. Nouns are packages (`llamajax.data`,
`llamajax.models`, ...), verbs are files that run (`python -m llamajax.train`).
"""
