"""What well-known domains are about, in words: texts of one more source for the embedded judge.

A judge that has seen one corpus a domain learns that corpus. A line of topics costs nothing, comes from no
corpus, and tells what else belongs to a domain. Names that are not known here have none;
`detect.judge.topics` gives or replaces them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LAW = (
    "contracts and their breach; a clause of an agreement between the parties; torts, negligence and "
    "liability; criminal law, charges and sentencing; constitutional rights; the opinion of a court of "
    "appeals; a judge, a jury and a verdict; statutes and regulations of the government; lawsuits, "
    "plaintiffs and defendants; evidence and procedure in court; copyright, patents and trademarks; "
    "privacy policies and the protection of personal data; terms of service and licence agreements; "
    "employment and labour law; property, leases and landlords; wills, trusts and inheritance; divorce "
    "and custody of children; immigration and visas; attorneys and their clients; international "
    "treaties; arbitration and settlement of disputes; legal compliance"
)
MEDICINE = (
    "diseases, their symptoms and causes; diagnosis and treatment of patients; drugs, doses and side "
    "effects; clinical trials and their results; surgery and operations; cancer and tumours; "
    "infections, viruses and vaccines; the heart and blood vessels; mental health, depression and "
    "anxiety; pregnancy and birth; children's health; nursing and care in hospitals; genetic disorders; "
    "diabetes, diet and obesity; pain and injuries; the anatomy of the human body; public health and "
    "epidemics; a doctor answers a patient's question; skin, eyes, ears and teeth; blood tests and "
    "medical imaging; physicians, clinics and emergency medicine; therapy and rehabilitation"
)
FINANCE = (
    "revenue, earnings and net income of a company; balance sheets and cash flow statements; stocks, "
    "bonds and dividends; interest rates and loans; banks and credit; investments, funds and "
    "portfolios; risk, return and volatility; taxes and tax rates; accounting, debits and credits; "
    "mergers and acquisitions; the stock market and trading; inflation and the economy; budgets and "
    "costs; insurance and pensions; mortgages and real estate prices; quarterly results and forecasts; "
    "assets, liabilities and equity; currencies and exchange rates; options, futures and hedging; "
    "financial analysts and shareholders; sales, margins and operating expenses; venture capital and "
    "start-ups"
)
MATHS = (
    "equations, proofs and theorems; calculus, integrals and derivatives; algebra and geometry; "
    "probability and statistics; word problems in arithmetic"
)
SCIENCE = (
    "physics: force, mass, energy and motion; electricity, magnetism and light; quantum mechanics and "
    "particles; thermodynamics, heat and temperature; chemistry: molecules, reactions and bonds; acids, "
    "bases and solutions; organic synthesis and catalysts; the periodic table and atoms; biology: "
    "cells, genes and proteins; plants, animals and photosynthesis; evolution and ecology; astronomy: "
    "stars, planets and galaxies; geology: rocks, earthquakes and volcanoes; climate, oceans and the "
    "atmosphere; laboratory experiments and measurements; materials science and engineering; "
    "microscopes, bacteria and microorganisms"
)
CODE = (
    "a function in Python that returns a list; a Java class with methods; C and C++ code with pointers; "
    "JavaScript for a web page; HTML and CSS; an SQL query on a database table; algorithms and data "
    "structures; sorting, searching and recursion; debugging an error message; unit tests of software; "
    "regular expressions; a shell script; web servers and APIs; version control with git; object- "
    "oriented programming; machine learning in code; loops, variables and conditions; reading and "
    "writing files; compilers and programming languages; software engineering and design patterns; "
    "installing packages and dependencies; JSON, XML and configuration files"
)
OTHER = (
    "history, wars and empires; politics and elections; films, television and actors; music, songs and "
    "bands; sports, teams and matches; novels, stories and poems; fictional characters in a role play; "
    "cooking, recipes and food; travel, cities and tourism; philosophy, ethics and religion; family, "
    "friends and relationships; everyday life and common sense; games and hobbies; fashion and "
    "shopping; education, schools and essays; art, painting and architecture; languages and grammar; "
    "animals and pets; biographies of people; news and weather; jobs, letters and e-mails; houses, "
    "gardens and cars"
)
KNOWN = {
    **dict.fromkeys(("law", "legal"), LAW),
    **dict.fromkeys(("medicine", "medical", "health", "healthcare", "biomedicine", "biomedical"), MEDICINE),
    **dict.fromkeys(("finance", "financial", "economics", "business"), FINANCE),
    **dict.fromkeys(("math", "maths", "mathematics"), MATHS),
    "science": SCIENCE,
    **dict.fromkeys(("code", "coding", "programming", "software"), CODE),
    **dict.fromkeys(("other", "others", "general", "chat", "misc"), OTHER),
}
"""Name in lower case -> topics, separated by semicolons."""


def topics_of(names: Sequence[str], given: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Topics of each domain, in the order of `names`; none for a name that is neither known nor given."""
    found = [list(given[name]) if name in given else split(KNOWN.get(name.lower(), "")) for name in names]
    if not {"math", "maths", "mathematics"} & {name.lower() for name in names}:
        for name, topics in zip(names, found, strict=True):
            if name.lower() == "science" and name not in given:
                topics += split(MATHS)
    return found


def split(line: str) -> list[str]:
    """Topics of a line of them."""
    return [topic.strip() for topic in line.split(";") if topic.strip()]
