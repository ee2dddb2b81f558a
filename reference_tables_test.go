package tacit

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/token"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// processes are those that have metrics and logs; every stands for each of them.
var processes = []string{"agent", "proxy", "control", "every process"}

// roomsOf are the packages that make the metrics and messages of a process. In wire/xds,
// functions of its clients are of agent and proxy, others are control's.
var roomsOf = map[string][]string{
	"agent":         {"node/agent", "cmd/tacit-node/agent*.go"},
	"proxy":         {"node/proxy", "identity", "cmd/tacit-node/proxy*.go"},
	"control":       {"control", "control/kube", "control/ca", "wire/csr", "cmd/tacit-control"},
	"every process": {"admin", "memory"},
}

// eachDeclOf visits the declarations that are of a process.
func eachDeclOf(t *testing.T, process string, visit func(*ast.File, ast.Decl)) {
	each := func(glob string, is func(name string) bool) {
		eachFile(t, glob, func(f *ast.File) {
			for _, d := range f.Decls {
				name := ""
				if fn, ok := d.(*ast.FuncDecl); ok {
					name = receiver(fn) + fn.Name.Name
				}
				if is(name) {
					visit(f, d)
				}
			}
		})
	}
	for _, room := range roomsOf[process] {
		if !strings.HasSuffix(room, ".go") {
			room += "/*.go"
		}
		each(room, func(string) bool { return true })
	}
	if process != "every process" {
		each("wire/xds/*.go", func(name string) bool {
			ofNodes := strings.Contains(name, "Client") || strings.HasPrefix(name, "delta.") || name == "keepTrying"
			return ofNodes != (process == "control")
		})
	}
}

// yamlFile is the root of a YAML or JSON file.
func yamlFile(t *testing.T, path string) *yaml.Node {
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(text, &doc); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return doc.Content[0]
}

// at is the value of a key of a mapping, by a path of keys; nil if there is none.
func at(n *yaml.Node, keys ...string) *yaml.Node {
	for _, key := range keys {
		var next *yaml.Node
		for i := 0; n != nil && n.Kind == yaml.MappingNode && i+1 < len(n.Content); i += 2 {
			if n.Content[i].Value == key {
				next = n.Content[i+1]
			}
		}
		if n = next; n == nil {
			return nil
		}
	}
	return n
}

// said is a comment as a sentence.
func said(comment string) string {
	lines := strings.Split(comment, "\n")
	for i, l := range lines {
		lines[i] = strings.TrimSpace(strings.TrimPrefix(l, "#"))
	}
	return strings.TrimSpace(strings.Join(lines, " "))
}

// valuesTable lists the values of the chart: default, what the schema allows, and the comment.
func valuesTable(t *testing.T) string {
	schema := yamlFile(t, "deploy/helm/tacit/values.schema.json")
	var b strings.Builder
	b.WriteString("| value | default | allowed | meaning |\n|---|---|---|---|\n")
	var walk func(path string, n, allowed *yaml.Node)
	walk = func(path string, n, allowed *yaml.Node) {
		for i := 0; i+1 < len(n.Content); i += 2 {
			key, v := n.Content[i], n.Content[i+1]
			name := strings.TrimPrefix(path+"."+key.Value, ".")
			rule := resolve(schema, at(allowed, "properties", key.Value))
			if rule == nil {
				t.Errorf("values.schema.json does not know the value %s", name)
			}
			// A comment that a blank line separates is about the whole file.
			paragraphs := strings.Split(key.HeadComment, "\n\n")
			about := said(paragraphs[len(paragraphs)-1])
			if v.Kind == yaml.MappingNode && v.Style&yaml.FlowStyle == 0 && len(v.Content) > 0 {
				if about != "" {
					fmt.Fprintf(&b, "| **%s** | | | %s |\n", code(name), cell(about))
				}
				walk(name, v, rule)
				continue
			}
			fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", code(name), code(short(t, v)), cell(allows(schema, rule)), cell(about))
		}
	}
	walk("", yamlFile(t, "deploy/helm/tacit/values.yaml"), schema)
	return b.String()
}

// short is a value in one line.
func short(t *testing.T, n *yaml.Node) string {
	flow := *n
	flow.Style, flow.HeadComment, flow.LineComment, flow.FootComment = n.Style|yaml.FlowStyle, "", "", ""
	text, err := yaml.Marshal(&flow)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

// resolve follows a reference to a definition.
func resolve(schema, rule *yaml.Node) *yaml.Node {
	if ref := at(rule, "$ref"); ref != nil {
		return at(schema, "definitions", strings.TrimPrefix(ref.Value, "#/definitions/"))
	}
	return rule
}

// allows says what a rule of the schema allows, as far as one line can.
func allows(schema, rule *yaml.Node) string {
	if rule == nil {
		return ""
	}
	if one := at(rule, "enum"); one != nil {
		var all []string
		for _, v := range one.Content {
			all = append(all, code(v.Value))
		}
		return strings.Join(all, ", ")
	}
	if any := at(rule, "anyOf"); any != nil {
		var all []string
		for _, r := range any.Content {
			all = append(all, allows(schema, r))
		}
		return strings.Join(all, " or ")
	}
	kind := at(rule, "type")
	if kind == nil {
		return ""
	}
	said := kind.Value
	if kind.Kind == yaml.SequenceNode {
		said = kind.Content[0].Value
	}
	least, most := at(rule, "minimum"), at(rule, "maximum")
	switch {
	case least != nil && most != nil:
		said += " from " + least.Value + " to " + most.Value
	case least != nil:
		said += ", at least " + least.Value
	}
	if items := resolve(schema, at(rule, "items")); items != nil && at(items, "type") != nil {
		said = "list of " + at(items, "type").Value
	}
	return said
}

// meshTable lists the fields of a part of the kind Mesh.
func meshTable(part string) func(*testing.T) string {
	return func(t *testing.T) string {
		versions := at(yamlFile(t, "deploy/helm/tacit/crd/mesh.yaml"), "spec", "versions")
		top := at(versions.Content[0], "schema", "openAPIV3Schema", "properties", part)
		var b strings.Builder
		b.WriteString("| field | type | default | meaning |\n|---|---|---|---|\n")
		var walk func(path string, n *yaml.Node)
		walk = func(path string, n *yaml.Node) {
			fields := at(n, "properties")
			if fields == nil {
				return
			}
			for i := 0; i+1 < len(fields.Content); i += 2 {
				name, f := path+"."+fields.Content[i].Value, fields.Content[i+1]
				text := func(key string) string {
					if v := at(f, key); v != nil {
						return v.Value
					}
					return ""
				}
				kind := text("type")
				items := at(f, "items")
				if one := at(f, "enum"); one != nil {
					kind = "one of"
					for _, v := range one.Content {
						kind += " " + code(v.Value)
					}
				}
				if items != nil {
					kind = "list of " + at(items, "type").Value
				}
				fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", code(name), kind, code(text("default")), cell(text("description")))
				walk(name, f)
				if items != nil {
					walk(name+"[]", items)
				}
			}
		}
		walk(part, top)
		return b.String()
	}
}

var isMetric = regexp.MustCompile(`^(tacit|istio)_[a-z_]+$`)

// metricsTable lists the metrics of a process, in the order of their names.
func metricsTable(t *testing.T, process string) string {
	var rows []string
	add := func(f *ast.File, d ast.Decl) {
		ast.Inspect(d, func(n ast.Node) bool {
			if row := metricRow(t, f, d, n); row != "" {
				rows = append(rows, row)
			}
			return true
		})
	}
	eachDeclOf(t, process, add)
	slices.Sort(rows)
	return "| metric | type | labels | meaning |\n|---|---|---|---|\n" + strings.Join(rows, "")
}

// metricRow is a row for a call that makes a metric: of prometheus, with options, or of a
// helper, with a name and a help; "" for another node.
func metricRow(t *testing.T, f *ast.File, in ast.Decl, n ast.Node) string {
	call, ok := n.(*ast.CallExpr)
	if !ok || len(call.Args) == 0 {
		return ""
	}
	labels := labelsOf(t, f, in, call)
	if options, ok := call.Args[0].(*ast.CompositeLit); ok {
		name, help, label := optionsOf(t, f, options)
		if label != "" {
			labels = []string{label}
		}
		return metricLine(name, kindOf(callee(call)), labels, help)
	}
	if len(call.Args) < 2 {
		return ""
	}
	return metricLine(textOf(t, f, call.Args[0]), kindOf(callee(call)), labels, textOf(t, f, call.Args[1]))
}

// optionsOf reads prometheus' options. label is the first of ConstLabels.
func optionsOf(t *testing.T, f *ast.File, options *ast.CompositeLit) (name, help, label string) {
	for _, e := range options.Elts {
		kv, ok := e.(*ast.KeyValueExpr)
		if !ok {
			continue
		}
		switch key, _ := kv.Key.(*ast.Ident); {
		case key == nil:
		case key.Name == "Name":
			name = textOf(t, f, kv.Value)
		case key.Name == "Help":
			help = textOf(t, f, kv.Value)
		case key.Name == "ConstLabels":
			if l, ok := kv.Value.(*ast.CompositeLit); ok && len(l.Elts) == 1 {
				label = textOf(t, f, l.Elts[0].(*ast.KeyValueExpr).Key)
			}
		}
	}
	return name, help, label
}

func metricLine(name, kind string, labels []string, help string) string {
	if !isMetric.MatchString(name) {
		return ""
	}
	if len(labels) > 5 {
		labels = []string{"those of Istio, below"}
	} else {
		for i := range labels {
			labels[i] = code(labels[i])
		}
	}
	return fmt.Sprintf("| %s | %s | %s | %s |\n", code(name), kind, strings.Join(labels, ", "), cell(help))
}

// kindOf is the type of metric that a function makes, by its name.
func kindOf(function string) string {
	for _, kind := range []string{"counter", "gauge", "histogram"} {
		if strings.Contains(strings.ToLower(function), kind) {
			return kind
		}
	}
	return "gauge" // a description says it where it is collected
}

// labelsOf are the label names of a metric: the second argument of the call, or the third of a
// description; a list, or a variable of the function or the file that is one. A helper of the file
// has it inside.
func labelsOf(t *testing.T, f *ast.File, in ast.Decl, call *ast.CallExpr) (labels []string) {
	list := func(x ast.Expr) {
		if l, ok := x.(*ast.CompositeLit); ok {
			for _, e := range l.Elts {
				labels = append(labels, textOf(t, f, e))
			}
		}
	}
	if len(call.Args) < 2 {
		return nil
	}
	at := call.Args[1]
	if callee(call) == "NewDesc" && len(call.Args) > 2 {
		at = call.Args[2]
	}
	list(at)
	var wanted string
	if id, ok := at.(*ast.Ident); ok {
		wanted = id.Name
	}
	if callee(call) == "trafficCounter" {
		wanted = "seriesLabels"
	}
	if wanted == "" {
		return labels
	}
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.AssignStmt:
			if id, ok := n.Lhs[0].(*ast.Ident); ok && id.Name == wanted && n.Tok == token.DEFINE && in.Pos() <= n.Pos() && n.End() <= in.End() {
				list(n.Rhs[0])
			}
		case *ast.ValueSpec:
			if n.Names[0].Name == wanted && len(n.Values) == 1 {
				list(n.Values[0])
			}
		}
		return true
	})
	return labels
}

// messagesTable lists what a process logs: level, message and the keys of its attributes.
func messagesTable(t *testing.T, process string) string {
	rows := map[string]bool{}
	add := func(f *ast.File, d ast.Decl) {
		ast.Inspect(d, func(n ast.Node) bool {
			if call, ok := n.(*ast.CallExpr); ok {
				if row := messageRow(t, f, call); row != "" {
					rows[row] = true
				}
			}
			return true
		})
	}
	eachDeclOf(t, process, add)
	all := slices.Sorted(maps.Keys(rows))
	return "| level | message | attributes |\n|---|---|---|\n" + strings.Join(all, "")
}

// levels are those of the functions that log. Log is told a level when it runs.
var levels = map[string]string{"Info": "info", "Warn": "warn", "Error": "error", "Log": "info or warn"}

// messageRow is a row for a call that logs; debug is for the developers.
func messageRow(t *testing.T, f *ast.File, call *ast.CallExpr) string {
	fn, ok := call.Fun.(*ast.SelectorExpr)
	if !ok || levels[fn.Sel.Name] == "" || len(call.Args) == 0 {
		return ""
	}
	logger := ""
	switch x := fn.X.(type) {
	case *ast.SelectorExpr:
		logger = x.Sel.Name
	case *ast.Ident:
		logger = x.Name
	}
	args := call.Args
	if fn.Sel.Name == "Log" && len(args) > 2 {
		args = args[2:] // a context and a level come first
	}
	message := textOf(t, f, args[0])
	if b, ok := args[0].(*ast.BinaryExpr); ok {
		message = cmp.Or(textOf(t, f, b.X), "…") + cmp.Or(textOf(t, f, b.Y), "…")
	}
	if strings.ToLower(logger) != "log" || message == "" {
		return ""
	}
	var keys []string
	next := true
	for _, a := range args[1:] {
		keys, next = appendKeys(t, f, keys, a, next)
	}
	for i := range keys {
		keys[i] = code(keys[i])
	}
	return fmt.Sprintf("| %s | %s | %s |\n", levels[fn.Sel.Name], cell(message), strings.Join(keys, ", "))
}

// appendKeys adds the key that an argument is, or those of what it appends to; next says whether
// a key comes next.
func appendKeys(t *testing.T, f *ast.File, keys []string, x ast.Expr, next bool) ([]string, bool) {
	call, ok := x.(*ast.CallExpr)
	switch {
	case ok && callee(call) == "append":
		for _, a := range call.Args {
			keys, next = appendKeys(t, f, keys, a, next)
		}
		return keys, next
	case ok && next && callee(call) == "attrs":
		return append(keys, "uid", "namespace", "pod"), true
	case !next:
		return keys, true
	}
	if key := textOf(t, f, x); key != "" {
		return append(keys, key), false
	}
	return keys, true
}
