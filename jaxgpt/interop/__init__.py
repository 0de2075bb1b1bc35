"""Models of other libraries: every foreign format becomes one value, an `Archive`, and back.

    open_folder("SmolLM2-135M/")  ->  Archive  ->  LanguageModel  ->  Archive  ->  write_folder(...)

`archive` defines the value, `huggingface` reads and writes it as a folder of transformers, and
`convert` is the only module that turns it into a model of this library and back, by the tables of
`names` (tensors) and `families` (configs).
"""
