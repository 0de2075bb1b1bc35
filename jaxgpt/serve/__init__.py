"""`jaxgpt serve`: a model behind the HTTP interface of OpenAI, with a chat page.

    request -> app (host, key, limits) -> schema (fields) -> jobs (rows of the engine)
            -> choices (pieces of text, from the engine's thread) -> results (JSON) -> response

The engine decodes all requests at once in one thread; the event loop only moves JSON. What takes
time (templates, tokenization, embeddings) runs in other threads.
"""
