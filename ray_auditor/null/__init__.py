"""The null population: benign finetunes of the user's base, that candidates are compared with.

`recipe` draws what each member is, `examples` reads what it is trained on, `train` trains it,
`population` keeps it; `run` is the verb.
"""
