"""A small HTTP server with OpenAI's protocol, for trying adapters of one base side by side. It needs the extra `serve`.

One answer is generated at a time. Serving many users, with continuous batching, is the work of vLLM, SGLang or
llama.cpp: export the model for them.
"""
