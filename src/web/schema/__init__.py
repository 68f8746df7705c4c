"""The API's description.

description.py  what handlers say of themselves
document.py     the OpenAPI document made of it
page.py         /schema: that document, and Swagger UI
"""
