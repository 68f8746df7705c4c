"""The API's description.

operations/     describes each operation: bodies, responses, problems
common.py       describes what all operations share
webhooks.py     describes the callbacks to Order Service
description.py  the types of these descriptions
document.py     builds the OpenAPI document from them
page.py         /schema: the document, and Swagger UI
"""
