"""How the report's page looks: its style sheet, beside that of the drawings in `chart`."""

STYLE = """
:root{color-scheme:light dark;--page:#fbfbf9;--ink:#16161a;--soft:#55545a;--faint:#85848a;--rule:#e3e2dc;--band:#f1f0ea;
--main:#2a5fa8;--raw:#7fa8d8;--good:#1d7a3e;--fair:#96690a;--bad:#bf2f2f;--rest:#b4b3ac}
@media (prefers-color-scheme:dark){:root{--page:#17171a;--ink:#f1f0ec;--soft:#bdbcb6;--faint:#8b8a86;--rule:#323236;
--band:#202024;--main:#7db0f0;--raw:#5583b8;--good:#5cc283;--fair:#dfae4a;--bad:#f08080;--rest:#5d5d63}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1128px;margin:0 auto;padding:32px 24px 48px}
h1{font-size:34px;line-height:1.15;margin:2px 0 10px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:19px;margin:0 0 12px}h3{font-size:13px;font-weight:600;margin:14px 0 2px;color:var(--soft)}
section{margin-top:44px}p{margin:0 0 8px}
.kicker{color:var(--faint);font-size:13px;margin:0}.state{font-size:17px;margin-bottom:18px;overflow-wrap:anywhere}
.note,.faint,footer,.barname{color:var(--soft);font-size:13.5px}
.note{border-left:3px solid var(--fair);padding-left:10px}
header+.note{margin-top:18px}.faint,footer{color:var(--faint)}footer{margin-top:44px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:18px 24px;margin:22px 0 0}
dt{color:var(--soft);font-size:13px}dd{margin:0;font-size:26px;line-height:1.25}
dd small{display:block;font-size:12.5px;line-height:1.4;color:var(--faint)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 20px;margin:0 0 10px;padding:0;color:var(--soft);
font-size:13.5px}
.key{width:14px;height:14px;vertical-align:-2px;margin-right:6px}
.narrow{display:none}.barname{margin:10px 0 3px}.barname b{color:var(--ink)}
.swatch{display:inline-block;width:11px;height:11px;border-radius:2px;background:var(--t);margin-right:8px}
.scroll{overflow-x:auto;margin:12px 0}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th{font-weight:500;color:var(--soft);font-size:13px;text-align:left;vertical-align:bottom}
th,td{padding:6px 14px 6px 0;border-bottom:1px solid var(--rule);vertical-align:top}
.n{text-align:right;white-space:nowrap;padding:6px 0 6px 14px}td small{color:var(--faint);font-size:12.5px}
td b{font-weight:600}.good{color:var(--good)}.fair{color:var(--fair)}.bad{color:var(--bad)}
.soft{color:var(--soft)}.outcome{min-width:11em;overflow-wrap:anywhere}.one{white-space:nowrap}.slim{max-width:520px}
code,pre{font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}
pre{white-space:pre-wrap;background:var(--band);padding:14px}summary{cursor:pointer;margin-top:14px}
@media (max-width:640px){main{padding:20px 14px 36px}h1{font-size:27px}.wide{display:none}.narrow{display:block}
section{margin-top:34px}.tiles{grid-template-columns:1fr 1fr}dd{font-size:22px}}
@media print{*{-webkit-print-color-adjust:exact;print-color-adjust:exact}body{background:none}
main{padding:0;max-width:none}.tiles{grid-template-columns:repeat(5,1fr)}section{break-inside:avoid-page}
.wide{display:block}.narrow{display:none}.scroll{overflow:visible}}
"""
