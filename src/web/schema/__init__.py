"""The API's description.

operations/     what each operation promises: bodies, answers, problems (description.py: as what)
document.py     the OpenAPI document made of it
page.py         /schema: that document, and Swagger UI
"""
