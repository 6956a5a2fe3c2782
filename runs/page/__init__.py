"""Pages that people look at: a run's report, its features, all runs of a folder. Each is one file and asks for nothing.

shell     what every page has: head, colours of light and dark, its scripts, a policy that forbids all else
charts    a chart as data, drawn twice: interactive by Chart.js, and still by matplotlib where no script may run
assets/   page.css; charts.js, tables.js, ours; chart.umd.min.js, Chart.js 4.6.1 as npm has it, less the link to its map

Why Chart.js: MIT, without dependencies, kept since 2013 and released this year, and 210 kB, so that it may lie inside
every page (1,000 reports: .2 GB). It draws on a canvas: a name of an SAE is never read as HTML. Apache ECharts (1.1 MB)
and Plotly (4.5 MB, 1 MB reduced) draw the same five kinds of chart, uPlot (50 kB) draws lines but no scatter by menu.
"""
