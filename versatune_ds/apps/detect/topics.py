"""What well-known domains are about, in words: texts of one more source for the embedded judge.

A judge that has seen one corpus a domain learns that corpus. Some topics and sentences cost nothing, come
from no corpus, and tell what else belongs to a domain. Names that are not known here have none;
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
EXAMPLES = {
    LAW: (
        "The court held that the defendant owed a duty of care to the plaintiff and that the duty "
        "had been breached.",
        "Either party may terminate this Agreement upon thirty days' written notice to the other party.",
        "Your lawyer can file a motion to dismiss if the complaint does not state a claim.",
        "By using this website you agree to these terms, and you may not copy or redistribute its "
        "content without permission.",
        "We share your personal information with service providers only as described in this "
        "policy, and you may ask us to delete it.",
        "Under the statute an employer may not discriminate against an employee because of age, "
        "religion or disability.",
        "A contract is formed when there is an offer, an acceptance and consideration; without them "
        "it cannot be enforced.",
        "The legislature passed the act last year, and several states have challenged it as "
        "unconstitutional.",
        "The tenant shall pay the rent on the first day of each month, and the landlord shall keep "
        "the premises in repair.",
        "My ex-husband does not pay child support; what can I do, and do I have to go to court?",
        "If we receive a notice that content infringes a copyright we will remove it and inform the "
        "user who posted it.",
        "The appellant was convicted of burglary, and argues that the evidence should have been suppressed.",
    ),
    MEDICINE: (
        "The patient was given antibiotics for ten days, and the fever went down after the second day.",
        "I have had pain in my lower back for three weeks; should I see a doctor, and is it safe to "
        "take ibuprofen?",
        "Of the 120 patients who were randomised, those in the treatment group had a lower blood "
        "pressure after six months.",
        "The nurse assesses the client's breathing, pulse and level of pain before giving the medication.",
        "Symptoms include headache, nausea and blurred vision; see your physician if they last "
        "longer than a day.",
        "We found that the expression of the receptor was associated with survival in patients with "
        "breast cancer.",
        "Vaccination protects children against measles, mumps and rubella, and serious side effects "
        "are rare.",
        "Nurses in the community work with families to promote health, prevent illness and provide "
        "care for older adults.",
        "The tumour was removed by surgery, followed by chemotherapy and radiation.",
        "Your test result is normal, so there is no need to worry; drink enough water and rest.",
        "The disorder is inherited in an autosomal recessive pattern, and both copies of the gene "
        "have mutations.",
        "People with schizophrenia or depression are treated with medication and with psychotherapy.",
    ),
    FINANCE: (
        "Revenue for the quarter rose by 8 percent to $2.1 billion, driven by higher sales in Asia.",
        "Shares of the company fell after it lowered its forecast of earnings for the full year.",
        "The present value of the bond is found by discounting its coupons at the market rate of interest.",
        "The accountant records the purchase by debiting inventory and crediting accounts payable.",
        "A diversified portfolio lowers the risk of an investor without lowering its expected return.",
        "Should I pay off my mortgage early or put the money into an index fund for retirement?",
        "The central bank raised interest rates by a quarter of a point to fight inflation.",
        "Depreciation expense for the year was $40,000, and the net book value of the equipment is $160,000.",
        "Operating income increased compared with the prior fiscal year because of lower selling "
        "and administrative expenses.",
        "The managers compare the variable cost per unit with its price, and prepare the budget for "
        "the next year.",
        "The firm issued new shares to raise capital and used the proceeds to repay its long-term debt.",
        "Financial statements are prepared under generally accepted accounting principles, which "
        "require that revenue be recognised when it is earned.",
    ),
    SCIENCE: (
        "When light passes from air into water it slows down, and its direction changes.",
        "A ball of mass 2 kg is thrown upwards at 10 m/s; find the greatest height that it reaches.",
        "The star has used up the hydrogen in its core, so it expands and becomes a red giant.",
        "The reaction of the acid with the base gives a salt and water, and heat is released.",
        "Astronomers observe how the planets move against the background of the constellations "
        "through the year.",
        "Plants take up carbon dioxide and, with the energy of the sun, make sugar and oxygen.",
        "We synthesised the compound in two steps and characterised it by X-ray diffraction and NMR "
        "spectroscopy.",
        "Let f be a continuous function on the interval; by the theorem it has a maximum there.",
        "Electrons in an atom can only have certain energies, and emit a photon when they fall to a "
        "lower level.",
        "A train travels 120 miles in 2 hours; how far does it get in 5 hours at the same speed?",
        "Rocks at the boundary of two plates are folded, and volcanoes and earthquakes are common.",
        "Species that are better adapted to their environment leave more offspring, and so their "
        "genes spread.",
    ),
    CODE: (
        "def area(width, height): return width * height",
        "The function raises a TypeError when its argument is None; add a check before the loop.",
        "for (int i = 0; i < n; i++) { sum += values[i]; }",
        "SELECT name, COUNT(*) FROM orders JOIN customers ON orders.customer_id = customers.id "
        "GROUP BY name;",
        "Create a new branch, commit your changes and open a pull request.",
        "const items = data.filter(item => item.price > 10).map(item => item.name);",
        "The algorithm keeps a queue of nodes and visits each of them once, so it runs in O(V + E).",
        "import numpy as np; x = np.zeros((3, 4)); print(x.shape)",
        "public class Stack<T> { private List<T> items = new ArrayList<>(); }",
        "The server answers each request with a JSON object and the status 200.",
        "Install the package with pip, then import it in your script.",
        '<div class="menu"><a href="index.html">Home</a></div>',
    ),
    OTHER: (
        "The king died in 1547, and his son, a boy of nine, followed him on the throne.",
        "She closed the door behind her and listened; nothing moved in the house but the old clock.",
        "Plato asks what justice is, and whether it is better to be just than to seem so.",
        "The film follows two brothers who inherit a farm, and won an award for its music.",
        "Mix the flour with the eggs and butter, and bake it for forty minutes until it is golden.",
        "An essay should open with a claim, and each paragraph should support it with an example.",
        "The team won the match in extra time and moved up to second place in the league.",
        "We spent a week in Lisbon, walked through the old town and ate fish by the river.",
        "As a pirate captain I would tell my crew: hoist the sails, for treasure awaits us!",
        "My sister is angry with me because I forgot her birthday; how can I make it up to her?",
        "Buddhists believe that suffering comes from desire, and that it ends with it.",
        "The candidate promised better schools and won the election by a narrow margin.",
    ),
}
"""Topics -> sentences as different kinds of text have them: textbooks, news, questions, documents."""
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
    """Texts of each domain, in the order of `names`; none for a name that is neither known nor given."""
    lines = [KNOWN.get(name.lower(), "") for name in names]
    found = [
        list(given[name]) if name in given else [*split(line), *EXAMPLES.get(line, ())]
        for name, line in zip(names, lines, strict=True)
    ]
    if not {"math", "maths", "mathematics"} & {name.lower() for name in names}:
        for name, topics in zip(names, found, strict=True):
            if name.lower() == "science" and name not in given:
                topics += split(MATHS)
    return found


def split(line: str) -> list[str]:
    """Topics of a line of them."""
    return [topic.strip() for topic in line.split(";") if topic.strip()]
