"""Amounts and currencies.

An amount is a whole number of the currency's minor unit (cents, paise; yen have none). The
documented column amount_cents is a Postgres INT, hence MAX_AMOUNT_CENTS.
"""

from decimal import Decimal

MIN_AMOUNT_CENTS = 1
MAX_AMOUNT_CENTS = 2_147_483_647

DEFAULT_CURRENCY = "INR"

_DECIMALS_OTHER_THAN_2 = {
    0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF",
    3: "BHD IQD JOD KWD LYD OMR TND",
    4: "CLF UYW",
}
_DECIMALS_2 = (
    "AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BMD BND BOB BOV BRL BSD BTN BWP BYN BZD "
    "CAD CDF CHE CHF CHW CNY COP COU CRC CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP "
    "GEL GHS GIP GMD GTQ GYD HKD HNL HTG HUF IDR ILS INR IRR JMD KES KGS KHR KPW KYD KZT LAK "
    "LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MXV MYR MZN NAD NGN NIO "
    "NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SDG SEK SGD SHP SLE SOS "
    "SRD SSP STN SVC SYP SZL THB TJS TMT TOP TRY TTD TWD TZS UAH USD USN UYU UZS VED VES WST "
    "XAD XCD XCG YER ZAR ZMW ZWG"
)

# ISO 4217 list one: the active codes with a minor unit, and its decimals. Codes without one
# (metals, funds, test codes) cannot be charged.
DECIMALS: dict[str, int] = dict.fromkeys(_DECIMALS_2.split(), 2) | {
    code: decimals for decimals, codes in _DECIMALS_OTHER_THAN_2.items() for code in codes.split()
}


def decimal_text(amount_cents: int, currency: str) -> str:
    """15.00 for INR, 1500 for JPY, 1.500 for KWD; raises KeyError for an unknown currency."""
    return str(Decimal(amount_cents).scaleb(-DECIMALS[currency]))


def amount_text(amount_cents: int, currency: str) -> str:
    """For people: 15.00 INR. An unknown currency is shown with two decimals."""
    return f"{Decimal(amount_cents).scaleb(-DECIMALS.get(currency, 2))} {currency}"
