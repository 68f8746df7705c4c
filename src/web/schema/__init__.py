"""The API's description.

operations/     what each operation promises: bodies, answers, problems
common.py       what is said of all of them
webhooks.py     what Order Service is sent
description.py  in which shapes an operation is described
document.py     the OpenAPI document made of it
page.py         /schema: that document, and Swagger UI
"""
