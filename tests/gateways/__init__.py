import pytest

# Before it is imported: its failed asserts show their values, as those of test modules do.
pytest.register_assert_rewrite("tests.gateways.conformance")
