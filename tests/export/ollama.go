// Render conversations as Ollama does: the text between the quotes of TEMPLATE, executed over .Messages and .System.
package main

import (
	"encoding/json"
	"log"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

func main() {
	var asked struct {
		Template      string
		Conversations [][]*message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		log.Fatal(err)
	}
	parsed, err := template.New("").Option("missingkey=zero").Parse(asked.Template)
	if err != nil {
		log.Fatal(err)
	}
	rendered := make([]string, len(asked.Conversations))
	for number, messages := range asked.Conversations {
		system := ""
		if len(messages) > 0 && messages[0].Role == "system" {
			system = messages[0].Content
		}
		var text strings.Builder
		values := map[string]any{"System": system, "Messages": messages, "Response": ""}
		if err := parsed.Execute(&text, values); err != nil {
			log.Fatal(err)
		}
		rendered[number] = text.String()
	}
	if err := json.NewEncoder(os.Stdout).Encode(rendered); err != nil {
		log.Fatal(err)
	}
}
